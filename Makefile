# Each target creates .venv and installs what it needs.

PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo check test lint bench record

.venv/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest pytest-xdist ruff "pyright[nodejs]" \
	    onnx onnxscript onnxruntime nbclient nbformat ipykernel
	touch $@

# Draw shapes, train a small captioner, score it and caption a picture.
demo: .venv/installed
	$(RUN) create_input_files.py --image_size 64
	$(RUN) train.py @configs/shapes.txt --overwrite
	$(RUN) eval.py --beam_sizes 3
	$(RUN) caption.py data/shapes/photos/test_04407.png

# Run this at every step: style, types and the fast tests, in two processes of one thread each.
check: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not slow"

# The whole suite; prints its slowest tests.
test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --durations=10

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

# The recipe for the best captions of Flickr8k: make record RECORD="--captions dataset_flickr8k.json --images Images".
# It takes hours; interrupt it and start it again as you like. See docs/results.md.
record: .venv/installed
	$(RUN) benchmarks/record.py $(RECORD)

bench: .venv/installed
	$(RUN) benchmarks/bench_train.py
	$(RUN) benchmarks/bench_caption.py
	$(RUN) benchmarks/bench_data.py
