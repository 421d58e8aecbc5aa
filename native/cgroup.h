/* cgroup.h - what Linux's control groups leave to this process: in containers less than the machine has. */
#ifndef KVS_CGROUP_H
#define KVS_CGROUP_H
#include "util.h"

typedef enum kvs_cgroup { KVS_CGROUP_PROCESSORS, KVS_CGROUP_BYTES } kvs_cgroup;

/* The tightest limit of v1 and v2, from the process's own groups up to the root; 0 = none, or there are no control groups. */
double kvs_cgroup_limit(kvs_cgroup what);
/* The same by the list of groups in this file, in the trees below this folder: for tests. */
double kvs_cgroup_limit_of(kvs_cgroup what, const char *list, const char *trees);
#endif
