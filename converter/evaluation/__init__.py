"""What a hybrid lost and what it saved: tasks, language quality, cost, and the report.

A new task is one file of `tasks/` and one line of its table.
"""
