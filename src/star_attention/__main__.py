"""`python -m star_attention`: the command line."""

import sys

try:
    from star_attention.cli import main

    main()
except KeyboardInterrupt:  # before a command has begun
    sys.exit(130)
