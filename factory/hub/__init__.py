"""Work with the Hugging Face Hub: turn a reference into a source, and a folder into a repository."""
