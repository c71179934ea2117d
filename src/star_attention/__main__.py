"""`python -m star_attention` and the script `star-attention`: the command line."""

import sys


def main() -> None:
    """Run a command. Interrupted before one has begun, it ends as one that is interrupted does, without a traceback."""
    try:
        from star_attention.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
