"""The router's scores: recorded, replayed through the native router, or forced on a model. Loads no model."""
