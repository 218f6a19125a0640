# syntax=docker/dockerfile:1
# The server, as `--target cpu` or `--target gpu`. It runs as any user, on a read-only root, and
# writes to /models and /tmp alone.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/bitwatt/bin:$PATH

FROM base AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/bitwatt
WORKDIR /src
ENV WHEEL_WITH_TWIN=true

FROM build AS wheel
COPY deploy/locked deploy/locked
RUN pip install --no-cache-dir --require-hashes -r deploy/locked/build.txt
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM build AS build-cpu
COPY deploy/locked deploy/locked
# PyTorch's own index for CPUs has builds without CUDA, gigabytes smaller: give its address here. Pip
# takes them from its own settings, too, where LOCKED is cpu.
ARG TORCH_INDEX=
ARG LOCKED=
RUN default=${TORCH_INDEX:+cpu} \
    && pip install --no-cache-dir --require-hashes \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
        -r "deploy/locked/${LOCKED:-${default:-cuda}}.txt"
# Kernels that don't compile are no error to pip, which builds the rest: the library must be there.
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
    && ls "$(python -c 'import bitwatt_kernels.cpu as c; print(*c.__path__)')/bitwatt_cpu.so"

FROM build AS build-gpu
COPY deploy/locked deploy/locked
RUN pip install --no-cache-dir --require-hashes -r deploy/locked/cuda.txt
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --no-deps /wheels/*.whl \
    && ls "$(python -c 'import bitwatt_kernels.cpu as c; print(*c.__path__)')/bitwatt_cpu.so"

FROM base AS runtime
# Users without a name in /etc/passwd are named by the environment; root's group may write.
RUN install -d -m 0775 -o 10001 -g 0 /models
ENV HOME=/tmp \
    USER=bitwatt \
    HF_HOME=/models/huggingface \
    TRITON_CACHE_DIR=/models/triton \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BITWATT_HOST=0.0.0.0 \
    BITWATT_PORT=8000 \
    BITWATT_LOG_FORMAT=json
VOLUME /models
WORKDIR /models
EXPOSE 8000
# Loading a model of gigabytes may take the ten minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bitwatt"]
CMD ["serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/bitwatt /opt/bitwatt
RUN ln -s "$(python -c 'import bitwatt.builtin as b; print(*b.__path__)')" /opt/builtin
USER 10001:0

FROM runtime AS gpu
# Triton builds its launchers with a C compiler when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-gpu /opt/bitwatt /opt/bitwatt
RUN ln -s "$(python -c 'import bitwatt.builtin as b; print(*b.__path__)')" /opt/builtin
# utility is NVML, which measures energy.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:0
