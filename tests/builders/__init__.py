"""What tests are made of: tiny models, texts, builds, healings, evaluations, commands."""
