# Each target creates .venv and installs what it needs by itself.

PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo check test lint bench record

.venv/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest pytest-xdist ruff "pyright[nodejs]" \
	    onnx onnxscript onnxruntime nbclient nbformat ipykernel
	touch $@

# Draws shapes, trains a small captioner, scores it and captions a picture.
demo: .venv/installed
	$(RUN) create_input_files.py --image_size 64
	$(RUN) train.py --overwrite --encoder regnet_x_400mf --encoder_layer trunk_output.block2 --encoder_weights= \
	    --fine_tune_encoder --encoder_learning_rate 2e-3 --grid_size 4 --region_dim 128 --embed_dim 128 \
	    --attention_dim 64 --hidden_dim 128 --dropout 0.1 --label_smoothing 0 --learning_rate 2e-3 \
	    --batch_size 16 --epochs 8
	$(RUN) eval.py --beam_sizes 3
	$(RUN) caption.py data/shapes/photos/test_04407.png

# What to run at every step: style, types and the fast tests. Two processes of one thread each.
check: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not slow"

# The whole suite, with its slowest tests.
test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --durations=10

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

# The recipe for the best captions of Flickr8k: make record RECORD="--captions dataset_flickr8k.json --images Images".
# Hours of work, which may be interrupted and started again: docs/results.md.
record: .venv/installed
	$(RUN) benchmarks/record.py $(RECORD)

bench: .venv/installed
	$(RUN) benchmarks/bench_train.py
	$(RUN) benchmarks/bench_caption.py
	$(RUN) benchmarks/bench_data.py
