"""The side that keeps: receiving, the epoch store, readiness, restore."""
