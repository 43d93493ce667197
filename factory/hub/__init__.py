"""The Hugging Face Hub: a reference becomes a source, a folder becomes a repository."""
