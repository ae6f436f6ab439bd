"""`python -m edge_ilseg`."""

from edge_ilseg.cli import main

if __name__ == "__main__":  # a worker process that is spawned imports this module under another name
    main()
