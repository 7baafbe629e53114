# hbpo_jax for Cloud TPU VMs (EXTRA=tpu), NVIDIA GPUs (cuda) and CPUs (cpu), with the packages that uv.lock pins.
#
#   docker build --build-arg EXTRA=cpu --tag hbpo .
#   docker run --rm --user="$(id -u)" --volume="$PWD/runs:/home/hbpo/runs" hbpo train --config=quickstart --workdir=runs/quickstart
#
# A GPU needs --gpus=all; a TPU --privileged --net=host --user=root, for its devices belong to root.

ARG PYTHON=3.12

FROM ghcr.io/astral-sh/uv:0.13.9 AS uv

FROM python:${PYTHON}-slim AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 UV_PROJECT_ENVIRONMENT=/opt/hbpo
WORKDIR /src
# The packages first: they are hundreds of megabytes, and stay as they are while the code changes.
COPY pyproject.toml uv.lock README.md LICENSE ./
ARG EXTRA=tpu
RUN case "$EXTRA" in tpu | cuda) ;; cpu) EXTRA='' ;; *) echo "error: EXTRA=$EXTRA; give tpu, cuda or cpu" >&2; exit 2 ;; esac \
  && uv sync --locked --no-cache --no-install-project --extra=gin --extra=wandb ${EXTRA:+--extra=$EXTRA}
COPY hbpo_jax hbpo_jax
COPY configs configs
RUN uv pip install --no-cache --no-deps --python=/opt/hbpo .

FROM python:${PYTHON}-slim
COPY --from=build /opt/hbpo /opt/hbpo
ENV PATH=/opt/hbpo/bin:$PATH HOME=/home/hbpo PYTHONUNBUFFERED=1
# Whoever runs it, such as --user="$(id -u)", has a home for JAX's compiled programs and the models of the hub.
RUN useradd --uid=1000 --create-home hbpo && chmod 777 /home/hbpo
USER hbpo
WORKDIR /home/hbpo
ENTRYPOINT ["hbpo"]
CMD ["--help"]
