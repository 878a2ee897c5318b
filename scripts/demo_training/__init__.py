"""The parts of `scripts/train_demo_model.py`; see there."""
