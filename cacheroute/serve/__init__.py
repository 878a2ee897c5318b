"""The OpenAI API over HTTP for one loaded model."""
