# alora-kernels in a container: `make docker`, or docker build --target cpu (or cuda) --tag alora-kernels:cpu .
#   docker run --rm -it alora-kernels:cpu demo                       # downloads the demo's model and data on its first run
#   docker run --rm -p 8000:8000 -v "$PWD/runs:/data/runs" -e ALORA_API_KEY alora-kernels:cpu \
#       serve smollm2-135m --adapter runs/demo/adapter --host 0.0.0.0
FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# Triton compiles its launchers with a C compiler on first use; torch's CPU kernels need OpenMP.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY alora_kernels alora_kernels
RUN useradd --create-home alora && mkdir /data && chown alora /data
ENTRYPOINT ["alora"]

# The CPU build of torch comes from an index of its own: --build-arg TORCH="torch==2.13.0 --index-url ..."
FROM base AS cpu
ARG TORCH="torch==2.13.0"
RUN pip install ${TORCH} && pip install -c constraints.txt '.[demo,serving,federated]'
USER alora
WORKDIR /data

# torch's wheel brings CUDA; the host needs a driver and `docker run --gpus all`.
FROM base AS cuda
ARG TORCH="torch>=2.11"
RUN pip install "${TORCH}" && pip install '.[demo,serving,federated,quant]'
USER alora
WORKDIR /data
