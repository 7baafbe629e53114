"""The miniature study: HBPO, its ablations and other methods, each on three seeds or one.

Command:  make miniature (two cores: some hours; --quick: half an hour), or
          python -m hbpo_jax.study --study=miniature/study --workdir=runs/miniature
Expect:   docs/miniature.md.
"""

from hbpo_jax.studies.plan import Method, Study

_PLAIN = {"reward.form": "classic", "advantage.intra_coef": 0.0}


def get_study():
  return Study(
      config="miniature/task",
      methods=(
          Method("classic", "0/1 reward", {"reward.form": "classic", "advantage.intra_coef": 0.0}),
          Method("cosine", "cosine reward", {"reward.form": "cosine", "advantage.intra_coef": 0.0}),
          Method("paper", "HBPO, paper", {"profile": "paper"}),
          Method("released", "HBPO, release", {"profile": "released"}),
          Method("hbpo", "HBPO, ours", {"profile": "hbpo"}),
      ),
      seeds=(0, 1, 2),
      rival_seeds=(0,),
      tune_seed=100,
      rates=(5e-5, 1.5e-4, 4.5e-4),
      n_eval=9_000,
      n_modes=1_200,
      n_tune=1_800,
      forced=("say:guess", "say:skim", "say:work", "say:check"),
      modes=("efficiency", "8", "16", "32", "64"),
  )
