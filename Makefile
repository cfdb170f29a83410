# make demo, make test, make lint and make bench each create .venv and install what they need by themselves.

PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo test lint bench

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt pytest ruff
	touch $@

demo: .venv/installed
	$(RUN) create_input_files.py --image_size 64
	$(RUN) train.py --overwrite --encoder regnet_x_400mf --encoder_layer trunk_output.block2 --encoder_weights= \
	    --fine_tune_encoder --encoder_learning_rate 2e-3 --grid_size 4 --region_dim 128 --embedding_size 128 \
	    --attention_size 64 --hidden_size 128 --dropout 0.1 --label_smoothing 0 --learning_rate 2e-3 \
	    --batch_size 16 --epochs 8
	$(RUN) eval.py --beam_sizes 3
	$(RUN) caption.py data/shapes/photos/test_04401.png

test: .venv/installed
	$(RUN) -m pytest -q

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: .venv/installed
	$(RUN) benchmarks/bench_train.py
	$(RUN) benchmarks/bench_caption.py
	$(RUN) benchmarks/bench_data.py
