# The server and the app in one image, on the CPU build of torch (for a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126)
#
#   docker build -t victorian .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/app/runs:ro" victorian
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /build
COPY requirements.txt .
RUN pip install --index-url "$TORCH_INDEX" "$(grep -m1 -i '^torch[=><~]' requirements.txt)" \
 && pip install -r requirements.txt

FROM python:3.11-slim
RUN useradd --uid 10001 --create-home writer && install -d -o writer -g writer /home/writer/.local /home/writer/.local/share
COPY --from=build /venv /venv
# huge pages for the weights: a token takes about a tenth less time (docs/results.md)
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 VLG_HOST=0.0.0.0 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
WORKDIR /app
COPY --chown=writer . .
USER 10001
# the decoding step, compiled for this processor; on another one the first start compiles it (ten seconds)
RUN python -m inference.quantize
EXPOSE 8000
# runs/ and models/ can be mounted: the newest run's model is served, else one of models/, unless VLG_MODEL names one
VOLUME ["/app/runs", "/app/models"]
HEALTHCHECK --interval=15s --timeout=3s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
STOPSIGNAL SIGTERM
# SageMaker's `serve` replaces the CMD and is understood as well: port 8080, model from /opt/ml/model
ENTRYPOINT ["python", "api.py"]
CMD ["--port", "8000"]
