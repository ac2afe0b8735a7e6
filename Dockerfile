# Three images of this repository:
#
#   docker build -t shoestring .                          for GPUs: NVIDIA's PyTorch, with Transformer Engine and Apex
#   docker build -t shoestring:deepep --target deepep .   adds DeepEP, for exchange=deepep on Hopper GPUs
#   docker build -t shoestring:cpu --target cpu .         for CPUs: the versions of requirements.lock
#
#   docker run --rm shoestring:cpu params model=deepseek_v3
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/workspace" shoestring \
#       train experiment=quickstart
#
# The working directory is /workspace, and any unprivileged user can run it. For several nodes, start
# /opt/shoestring/launch/torchrun.sh on each.

# 26.05 has torch 2.12 (setup.cfg requires 2.11), CUDA 13.2, and NCCL 2.30.4, the oldest that DeepEP supports.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
ARG CPU_BASE=python:3.11-slim

FROM ${CPU_BASE} AS cpu
# PyPI's torch depends on gigabytes of CUDA libraries. To avoid them, set this to PyTorch's index of CPU wheels.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/shoestring
# The requirements are a separate layer, so that an edit of the code does not reinstall them.
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
# The image's torch and numpy stay: they are not among the requirements; constraints keep dependencies from replacing
# them. The last line fails if one has changed.
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
# Not yet built. DeepEP asserts at import that the libnccl which torch has loaded is identical to the one that it was
# built with. It expects lib/ and include/ in one directory; NVIDIA's image has them in the system's directories.
# EP_NCCL_ROOT_DIR is read at each import. In an environment of wheels, where torch brings an older NCCL, it is not
# needed:
#   pip install --no-deps "nvidia-nccl-cu13>=2.30.4"
#   TORCH_CUDA_ARCH_LIST=9.0 pip install --no-deps --no-build-isolation <clone of DeepEP, with its submodule>
# `shoestring doctor` imports DeepEP and reports whether it works; a build has no GPU driver, so it cannot be tested.
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

# The last stage is the default of a build without --target.
FROM training AS gpu
