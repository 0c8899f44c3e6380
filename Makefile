# make demo         pre-trains CAE v2 on the built-in images and probes its features: minutes on a laptop
# make demo-mfm     the same for MAE and for MFM, side by side
# make demo-beyond  the same for each task of Beyond Masking, the two best-known ones at length
# make test         the test suite
# make faults       what disks, signals and damaged files do to runs, and a table of it (15 minutes or more)
# make docs         the pages docs/site/*.html, from the code and a run of it (20 seconds)
# Each makes .venv when it is missing. PYTHON=/path/to/python uses an existing environment instead.

ifdef PYTHON
ENVIRONMENT :=
else
PYTHON := .venv/bin/python
ENVIRONMENT := .venv/ready
endif

# Threads that wait for each other by spinning make a busy machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-mfm demo-beyond test faults docs

demo: $(ENVIRONMENT)
	$(PYTHON) cae_v2.py --demo
	@echo "probing the encoder ..."
	@$(PYTHON) -m eval.linear_probe --checkpoint runs/cae_v2_demo/encoder.safetensors --data scenes --protocol ridge

demo-mfm: $(ENVIRONMENT)
	$(PYTHON) mfm_mae.py --demo --fuse none --out runs/mae_demo
	@echo "probing MAE ..."
	@$(PYTHON) -m eval.linear_probe --checkpoint runs/mae_demo/encoder.safetensors --data scenes --protocol ridge
	$(PYTHON) mfm_mae.py --demo
	@echo "probing MFM ..."
	@$(PYTHON) -m eval.linear_probe --checkpoint runs/mfm_mae_demo/encoder.safetensors --data scenes --protocol ridge

# `mask` and the best practice run to their end, the others 100 steps: they take longer and show less.
demo-beyond: $(ENVIRONMENT)
	@set -e; for task in mask mask+zoom_in mask+zoom_out mask+distort zoom_in zoom_out distort blur decolor; do \
		case $$task in mask|mask+zoom_in) steps=;; *) steps="--max_steps 100";; esac; \
		$(PYTHON) beyond_masking.py --demo --task $$task $$steps --out runs/beyond_demo/$$task; \
		echo "probing $$task ..."; \
		$(PYTHON) -m eval.linear_probe --checkpoint runs/beyond_demo/$$task --data scenes --protocol ridge; \
	done

test: $(ENVIRONMENT)
	$(PYTHON) -m pytest

# KILLS=50 is how often each of the seven scripts is killed.
faults: $(ENVIRONMENT)
	$(PYTHON) -m pytest -m "slow or not slow" tests/test_faults.py tests/test_runs.py

docs: $(ENVIRONMENT)
	$(PYTHON) -m docs.build

.venv/ready: pyproject.toml
	@echo "making .venv and installing torch, torchvision, einops, open_clip, tqdm, pytest (a few minutes)"
	python3 -m venv .venv
	.venv/bin/python -m pip install -q ".[test]"
	@touch $@
