"""What a run shows while it trains: events, and the sinks that show, write or pass them on."""
