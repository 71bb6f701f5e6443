# sanitize and a Ray that can join a cluster.
#   CPU:   docker build -t sanitize .
#   CUDA:  docker build -t sanitize:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# The CUDA wheels of torch bring their own CUDA libraries; the host needs a driver and the NVIDIA container toolkit. BASE may
# be any image with Python 3.11 or newer, for example an nvidia/cuda image of yours with Python in it.
ARG BASE=python:3.12-slim-bookworm

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml MANIFEST.in README.md CHANGELOG.md LICENSE ./
COPY sanitize ./sanitize
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=cluster,s3,timm,clip
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# pyproject.toml has the lower bounds; to build the same image twice, give exact versions or keep the image by its digest
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.11" "torchvision>=0.26"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]" && rm -r /wheels
RUN useradd --create-home --uid 1000 sanitize
USER 1000
WORKDIR /home/sanitize
CMD ["sanitize", "--help"]
