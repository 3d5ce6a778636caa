"""What both roles speak: domain values, wire messages, configuration, CRIU, fencing, addresses."""
