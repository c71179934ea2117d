"""Run the command line: `python -m star_attention` and the script `star-attention`."""

import sys


def main() -> None:
    """Run a command. Ctrl-C while its modules are imported exits with status 130, no traceback."""
    try:
        from star_attention.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
