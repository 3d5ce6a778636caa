/* SPDX-License-Identifier: MIT
 *
 * What the agent and the shim inside criu say to each other: one shared memory file, whose descriptor criu
 * inherits (OUTLIVE_SHIM_FD). The agent fills in plans before it asks for a dump; the shim fills in reports.
 * `primary/shim.py` has the same layout.
 */
#ifndef OUTLIVE_SHIM_PROTOCOL_H
#define OUTLIVE_SHIM_PROTOCOL_H

#include <stdint.h>

#define SHIM_MAGIC 0x4f55544c49564531ULL
#define SHIM_ROOM 4096 /* most processes of one dump */

/* The smaps of one process as the agent read it, and the maps that its header lines make. */
struct shim_plan {
	uint32_t pid;
	uint32_t unused;
	uint64_t maps_offset, maps_bytes;
	uint64_t smaps_offset, smaps_bytes;
};

enum {
	SHIM_SMAPS_SERVED = 1, /* the frozen maps were as planned */
	SHIM_SMAPS_REAL = 2,   /* they were not, or there was no plan */
	SHIM_UNKNOWN_SCAN = 4, /* criu asked for pages in a way that this shim does not know */
	SHIM_FAILED = 8,       /* the frozen maps could not be read or understood: criu dumps it all itself */
};

/* What was done for one process of the dump. */
struct shim_report {
	uint32_t pid;
	uint32_t flags;
	uint32_t scans; /* scans (or reads of the pagemap) from which pages were hidden */
	uint32_t unused;
};

struct shim_shared {
	uint64_t magic;
	uint64_t bytes;     /* of the whole file */
	uint32_t plans;     /* how many are filled in */
	uint32_t reports;   /* how many the shim filled in; more than SHIM_ROOM: not all are here */
	uint32_t loaded;    /* the shim found its way into criu: 1 */
	uint32_t unused;
	struct shim_plan plan[SHIM_ROOM];
	struct shim_report report[SHIM_ROOM];
};

#endif
