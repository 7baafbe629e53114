"""Everything that talks to the Hugging Face hub: checkpoints and data files that come, exports that go.

HF_TOKEN (or `hf auth login`), HF_ENDPOINT, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE mean what they mean to
`huggingface_hub`. Code and pickles of a repository are never fetched: the weights come as safetensors or not at all.
"""

from hbpo_jax.hub.cache import checkpoint as checkpoint
from hbpo_jax.hub.cache import data_files as data_files
from hbpo_jax.hub.cache import find_cached as find_cached
from hbpo_jax.hub.cache import origin as origin
from hbpo_jax.hub.push import check_repository as check_repository
from hbpo_jax.hub.push import push as push
from hbpo_jax.hub.repository import DEFAULT_ENDPOINT as DEFAULT_ENDPOINT
from hbpo_jax.hub.repository import GatedError as GatedError
from hbpo_jax.hub.repository import HubError as HubError
from hbpo_jax.hub.repository import is_hub_id as is_hub_id
