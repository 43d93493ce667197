"""Train an adapter on the pruned model, and merge it."""
