"""What an evaluation asks: one file a kind of task, one line each in `table.py`."""
