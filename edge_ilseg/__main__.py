"""`python -m edge_ilseg`."""

from edge_ilseg.cli import main

main()
