"""Other engines: what each honours (`support.py`), and GGUF for llama.cpp (`gguf/`)."""
