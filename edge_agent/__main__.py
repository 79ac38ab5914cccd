"""`python -m edge_agent`: how the agent starts its own children, whatever PATH says."""

from edge_agent.cli import main

main()
