"""Working directories in a bucket: gs://BUCKET/DIR in the place of a directory.

Clients of buckets are imported when a bucket is opened; runs on a disk pay nothing.
"""

from hbpo_jax.bucket.objects import BucketError as BucketError
from hbpo_jax.bucket.objects import check as check
from hbpo_jax.bucket.objects import is_url as is_url
from hbpo_jax.bucket.workdir import COMMANDS as COMMANDS
from hbpo_jax.bucket.workdir import SCRATCH as SCRATCH
from hbpo_jax.bucket.workdir import opened as opened
from hbpo_jax.bucket.workdir import reading as reading
from hbpo_jax.bucket.workdir import scratch_of as scratch_of
from hbpo_jax.bucket.workdir import settle as settle
