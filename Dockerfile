# FlowRL in a container, for CPU or CUDA:
#   docker build -t flowrl --build-arg TORCH_INDEX=URL .   # PyTorch's index of the build to take; default: CUDA's
#   mkdir -p outputs && docker run --rm --gpus all --user "$(id -u)" -v "$PWD/outputs:/runs/outputs" flowrl train debug=smoke
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=
# `serve,ocr` for a reward server, say.
ARG EXTRAS=serve

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

# PyTorch in a layer of its own: it is most of the image, and changes least.
COPY constraints.txt /src/
RUN pip install --no-cache-dir --constraint /src/constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision

COPY pyproject.toml setup.py README.md LICENSE NOTICE /src/
COPY flowrl /src/flowrl
COPY hydra_plugins /src/hydra_plugins
COPY conf /src/conf
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[$EXTRAS]"

# A user without rights, whose runs and downloads stay below /runs.
RUN useradd --create-home --home-dir /runs flowrl
USER flowrl
WORKDIR /runs
ENTRYPOINT ["flowrl"]
CMD ["--help"]
