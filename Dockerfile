# alto_jax with its commands and the demo page.
#   docker build -t alto_jax .                                           CPU
#   docker build -t alto_jax:cuda --build-arg EXTRAS=page,cuda .         GPUs (docker run --gpus all …)
#   docker run -p 7860:7860 alto_jax                                     the demo page
#   docker run -v "$PWD:/data" alto_jax alto-predict --checkpoint alto-tiny --image photo.jpg --text "the cup" --out mask.png
FROM python:3.12-slim

# The wheels of jax bring CUDA with them: the host gives the driver alone.
ARG EXTRAS=page

WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" && useradd --create-home --uid 1000 alto

USER 1000
WORKDIR /data
EXPOSE 7860
CMD ["alto-demo", "--host", "0.0.0.0"]
