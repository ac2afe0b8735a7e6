# Three images of this repository:
#
#   docker build -t shoestring .                          for GPUs: NVIDIA's PyTorch, with Transformer Engine and Apex
#   docker build -t shoestring:deepep --target deepep .   the same with DeepEP, for exchange=deepep on Hopper GPUs
#   docker build -t shoestring:cpu --target cpu .         for CPUs: the versions of requirements.lock
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

FROM ${BASE} AS training
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

FROM training AS deepep
# Not yet built. DeepEP asserts, when it is imported, that the libnccl which torch has loaded is byte for byte the one
# that DeepEP was built with. It looks for lib/ and include/ below one directory; in NVIDIA's image these are the
# system's. EP_NCCL_ROOT_DIR is read again at each import. In an environment of wheels, where torch brings an older
# NCCL, no directory has to be named:
#   pip install --no-deps "nvidia-nccl-cu13>=2.30.4"
#   TORCH_CUDA_ARCH_LIST=9.0 pip install --no-deps --no-build-isolation <clone of DeepEP, with its submodule>
# `shoestring doctor` imports DeepEP and says whether it works; this cannot be done here, without a GPU's driver.
ARG DEEPEP=dd758caf451848bd150e1046af3d0a73e5fff38d
USER 0:0
ENV EP_NCCL_ROOT_DIR=/opt/nccl
RUN install -d /opt/nccl/lib /opt/nccl/include \
    && ln -s /usr/lib/"$(uname -m)"-linux-gnu/libnccl.so* /opt/nccl/lib/ \
    && ln -s /usr/include/nccl* /opt/nccl/include/ \
    && pip install --no-cache-dir --no-deps nvidia-nvshmem-cu13==3.4.5 \
    && git clone https://github.com/deepseek-ai/DeepEP /tmp/deepep \
    && git -C /tmp/deepep checkout "$DEEPEP" \
    && git -C /tmp/deepep submodule update --init \
    && TORCH_CUDA_ARCH_LIST=9.0 pip install --no-cache-dir --no-deps --no-build-isolation /tmp/deepep \
    && rm -rf /tmp/deepep
USER 10001:10001

# The last stage is what a build without --target makes.
FROM training AS gpu
