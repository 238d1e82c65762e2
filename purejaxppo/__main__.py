"""``python -m purejaxppo``, the command line."""

from purejaxppo.cli.commands import main

if __name__ == "__main__":
    main()
