# Two images of this repository:
#
#   docker build -t shoestring .                      for GPUs: NVIDIA's PyTorch, with Transformer Engine and Apex
#   docker build -t shoestring:cpu --target cpu .     for CPUs: the versions of requirements.lock
#
#   docker run --rm shoestring:cpu params model=deepseek_v3
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" shoestring \
#       train experiment=quickstart
#
# The work is done in /workspace, as any user without rights. On several nodes, /opt/shoestring/launch/torchrun.sh.

# 26.05 brings torch 2.12 (setup.cfg asks for 2.11), CUDA 13.2, and NCCL 2.30.4, the oldest that DeepEP works with.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
ARG CPU_BASE=python:3.11-slim

FROM ${CPU_BASE} AS cpu
# PyPI's torch brings gigabytes of CUDA libraries. To leave them out, name here PyTorch's index of CPU wheels.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/shoestring
# The requirements have a layer of their own, which an edit of the code leaves as it is.
COPY setup.cfg requirements.lock ./
RUN python3 -m venv /opt/venv \
    && sed -n '/^install_requires/,/^$/s/^ \+//p' setup.cfg >/opt/venv/requirements.txt \
    && /opt/venv/bin/pip install --no-cache-dir --constraint requirements.lock \
        --requirement /opt/venv/requirements.txt setuptools
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && install -d -m 1777 /workspace
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp USER=shoestring
WORKDIR /workspace
USER 10001:10001
ENTRYPOINT ["shoestring"]

FROM ${BASE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/shoestring
COPY setup.cfg requirements.lock ./
# The image's own torch and numpy stay: pip is not asked for them, and may not replace them for another's sake. The last
# line fails where torch has changed all the same.
RUN pip list --format=freeze | grep -E '^(torch|numpy)==' >/opt/shoestring/image.txt \
    && sed -n '/^install_requires/,/^$/s/^ \+//p' setup.cfg | grep -vE '^(torch|numpy) ' >/opt/shoestring/requirements.txt \
    && pip install --no-cache-dir --constraint image.txt --requirement requirements.txt \
    && pip list --format=freeze | grep -E '^(torch|numpy)==' | diff image.txt -
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && install -d -m 1777 /workspace
ENV HOME=/tmp USER=shoestring
WORKDIR /workspace
USER 10001:10001
ENTRYPOINT ["shoestring"]
