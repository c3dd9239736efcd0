"""What a hybrid lost and what it saved: tasks, language quality, cost, and the report."""
