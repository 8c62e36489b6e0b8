# tip-ray for NVIDIA GPUs, run by user 1000. The wheels bring CUDA's libraries; the driver is the
# host's. Built; never run on a GPU so far.
#
#   docker build -f docker/gpu.Dockerfile -t tip-ray:0.1.0-gpu .
#
# With `--secret id=pip.conf,src=pip.conf` where pip needs an index of yours; it does not stay.

ARG BASE_IMAGE=debian:bookworm-20261005-slim

FROM ${BASE_IMAGE} AS build
# Debian keeps only the newest build of a package: pins would not last, the base image is the pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tip-ray/venv
ENV PATH=/opt/tip-ray/venv/bin:$PATH

# Everything that tip-ray needs, in a layer that only these two files change.
WORKDIR /needed
COPY pyproject.toml constraints-gpu.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    mkdir tip_ray && touch tip_ray/__init__.py README.md LICENSE \
    && pip install --no-cache-dir --constraint constraints-gpu.txt '.[gpu,math,s3]'

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tip_ray tip_ray
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps --force-reinstall .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="tip-ray" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# KubeRay starts and probes Ray with bash and wget; torch and vLLM ask for the user's name; Triton
# compiles its launchers where they run, which takes a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
       bash ca-certificates gcc libc6-dev python3 python3-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 tip-ray \
    && useradd --uid 1000 --gid 1000 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin tip-ray
COPY --from=build /opt/tip-ray /opt/tip-ray
COPY job_specs /opt/tip-ray/job_specs
# FlashInfer's sampler would be compiled with nvcc at the start, which is not here.
ENV PATH=/opt/tip-ray/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_USE_FLASHINFER_SAMPLER=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /tmp
USER 1000:1000
RUN --mount=type=tmpfs,target=/tmp tip-ray validate /opt/tip-ray/job_specs/quickstart.yaml
CMD ["tip-ray", "--help"]
