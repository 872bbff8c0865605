# python -> kernels (nvcc), wheel, packages -> runtime, server, dev; without --target, the runtime. See docs/containers.md.
# PIP_CONSTRAINT pins every Python package, those that builds need too.
# A private index or certificate: --secret id=pip.conf,src=FILE --secret id=ca,src=FILE; neither of them stays in the image.
ARG BASE=debian:13.8-slim

# The interpreter. gcc and its headers: Triton compiles its launcher on first use. ibverbs: NCCL over InfiniBand.
FROM ${BASE} AS python
# Packages of Debian have no pins: the tag of the base fixes the release, whose archive keeps no older versions.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      ca-certificates gcc ibverbs-providers libc6-dev libibverbs1 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/foundation \
 && useradd --uid 1000 --gid 0 --create-home foundation \
 && chmod g=u /home/foundation \
 && mkdir --mode=1777 /workspace
ENV PATH=/opt/foundation/bin:$PATH \
    PIP_CONSTRAINT=/opt/foundation/constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
ARG CONSTRAINTS=constraints.txt
COPY ${CONSTRAINTS} /opt/foundation/constraints.txt

# nvcc as a Python package, of the CUDA release that torch is built with: no other base image is needed.
FROM python AS kernels
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    pip install --target /opt/nvcc 'cuda-toolkit[nvcc]'
ENV CUDA_HOME=/opt/nvcc/nvidia/cu13 LIBRARY_PATH=/opt/nvcc/nvidia/cu13/lib
COPY kernels/rpe_attention /src
ARG ARCHITECTURES=sm_80,sm_90a,sm_100
RUN python3 /src/building.py build --arch "${ARCHITECTURES}" --out /opt/kernels/rpe_attention.so

FROM python AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY foundation foundation
COPY kernels kernels
COPY launch launch
COPY shards shards
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    pip wheel --no-deps --wheel-dir /wheel .

# What the project needs, without the project: this layer is as old as its pins. PIP_EXTRA_INDEX_URL: torch for CPUs.
FROM python AS packages
WORKDIR /src
COPY pyproject.toml ./
ARG EXTRAS=gpu,mlflow,accelerate,deepspeed,timm,scenes,s3,gcs,http,zstd
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    touch README.md LICENSE \
 && pip install ".[${EXTRAS}]" \
 && pip uninstall --yes sar-foundation

FROM packages AS runtime
COPY --from=kernels /opt/kernels /opt/foundation/kernels
COPY --chmod=755 launch/image/entrypoint.sh /opt/foundation/bin/entrypoint
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-deps --no-index /wheel/*.whl
WORKDIR /workspace
COPY configs configs
# The last two lines let the hooks of Docker, Enroot and Kubernetes bring the driver in. MLflow need not miss git aloud.
ENV GIT_PYTHON_REFRESH=quiet \
    SAR_FOUNDATION_KERNELS=/opt/foundation/kernels/rpe_attention.so \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
USER 1000
# The GPUs are out of sight of this look: they belong to the run, which would be found on them as a stranger.
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=2 \
    CMD ["env", "CUDA_VISIBLE_DEVICES=", "PATH=/opt/foundation/bin", "foundation", "doctor", "--seconds", "0.1", "--wait", "10"]
ENTRYPOINT ["/opt/foundation/bin/entrypoint"]
CMD ["foundation", "--help"]
ARG BASE
ARG REVISION=
ENV SAR_FOUNDATION_COMMIT="${REVISION}"
LABEL org.opencontainers.image.title="sar-foundation" \
      org.opencontainers.image.description="Large-scale self-supervised pretraining for synthetic-aperture-radar images" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"

# MLflow for a team, of the version that the runs have: see compose.yaml.
FROM python AS server
# hadolint ignore=DL3013
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    pip install mlflow 'psycopg[binary]' boto3
COPY --chmod=755 launch/image/bucket.py /opt/foundation/bin/make-bucket
WORKDIR /workspace
USER 1000
ENV MLFLOW_HOST=0.0.0.0 MLFLOW_PORT=5000 PYTHONUNBUFFERED=1
EXPOSE 5000
HEALTHCHECK --interval=30s --timeout=10s --start-period=2m \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"MLFLOW_PORT\"]}/health', timeout=5)"]
CMD ["mlflow", "server"]

# To work on the project: mount a clone over /workspace. Compilers, nvcc, and what tests and lint need.
FROM packages AS dev
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ git make \
 && rm -rf /var/lib/apt/lists/*
COPY --from=kernels /opt/nvcc /opt/nvcc
COPY --chmod=755 launch/image/entrypoint.sh /opt/foundation/bin/entrypoint
WORKDIR /workspace
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    pip install --editable '.[dev]'
ENV CUDA_HOME=/opt/nvcc/nvidia/cu13 \
    LIBRARY_PATH=/opt/nvcc/nvidia/cu13/lib \
    PATH=/opt/nvcc/nvidia/cu13/bin:$PATH \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all
USER 1000
ENTRYPOINT ["/opt/foundation/bin/entrypoint"]
CMD ["bash"]

# What a build makes that names no target.
FROM runtime
