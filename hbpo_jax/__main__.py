"""`python -m hbpo_jax` is the program `hbpo`."""

from hbpo_jax import cli

if __name__ == "__main__":
  cli.cli()
