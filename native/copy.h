/* SPDX-License-Identifier: MIT
 *
 * Copies pages of other processes.
 */
#ifndef OUTLIVE_COPY_H
#define OUTLIVE_COPY_H

#include "space.h"

/* Copy one run by the file that needs no read permission. An errno. */
int read_unreadable(int pid, uint64_t start, uint64_t bytes, uint8_t *into);

/* Copy the runs that have `flag`; an errno, and nothing is to be believed then. */
int read_runs(int pid, const struct run *runs, uint64_t count, uint32_t flag, uint8_t *into);

#endif
