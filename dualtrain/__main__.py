"""``python -m dualtrain``: the command line, for launchers that start modules."""

from dualtrain.cli import main

if __name__ == "__main__":
    main()
