"""``python -m dualtrain``: the command line, for launchers that start modules."""

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        # The current directory goes behind: a random.py in it is not what libraries mean.
        sys.path.append(sys.path.pop(0))
    from dualtrain.cli import main

    main()
