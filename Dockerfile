# fastkd and NVIDIA DALI for GPUs. Build it in a clone: docker build -t fastkd .
# Run it: docker run --gpus all --ipc=host -v DATA:/data -v RUNS:/runs fastkd train --data /data --out /runs/r18 ...
# --ipc=host, or --shm-size=8g: Docker's 64 MB of shared memory are too small for the workers of a loader.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[dali,hf,parquet,tensorboard]' && rm -rf /src
WORKDIR /runs
ENTRYPOINT ["fastkd"]
CMD ["doctor"]
