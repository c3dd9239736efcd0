"""The entry of the command: an interrupt ends it quietly from its first moment on."""

import sys


def main() -> None:
    """Run the command line and exit; what it needs is imported inside."""
    try:
        from converter.cli import main as command_line
    except KeyboardInterrupt:
        # As when it is interrupted later (see `converter.cli`).
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
