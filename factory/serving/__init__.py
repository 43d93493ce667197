"""Where the result runs right, and the limits that this sets to a cut."""
