#include "cgroup.h"

#include <stdio.h>
#include <string.h>

static bool read_line(const char *group, const char *name, char *line, int size) {
    char path[1400];
    snprintf(path, sizeof path, "%s/%s", group, name);
    FILE *file = kvs_refused() ? NULL : fopen(path, "re");
    if (!file) return false;
    bool ok = fgets(line, size, file) != NULL;
    fclose(file);
    return ok;
}

/* Of one group; "max" scans as nothing, and -1 is no limit. */
static double processors(const char *group, bool v2) {
    char line[64];
    double quota = 0, period = 0;
    if (!read_line(group, v2 ? "cpu.max" : "cpu.cfs_quota_us", line, sizeof line)) return 0;
    int n = sscanf(line, "%lf %lf", &quota, &period);
    if (!v2 && n == 1 && (!read_line(group, "cpu.cfs_period_us", line, sizeof line) || sscanf(line, "%lf", &period) != 1)) return 0;
    return quota > 0 && period > 0 ? quota / period : 0;
}

static double bytes(const char *group, bool v2) { /* v1's "no limit" is a number beyond any memory */
    char line[64];
    double limit = 0;
    if (!read_line(group, v2 ? "memory.max" : "memory.limit_in_bytes", line, sizeof line)) return 0;
    return sscanf(line, "%lf", &limit) == 1 && limit > 0 ? limit : 0;
}

static double tighter(double a, double b) { return a == 0 || (b > 0 && b < a) ? b : a; }

/* In a container the path may be the host's: then only its upper parts, or the root, exist. */
static double tree_limit(kvs_cgroup what, const char *root, char *path, bool v2) {
    double tightest = 0;
    for (;;) {
        char group[1300];
        snprintf(group, sizeof group, "%s%s", root, path);
        tightest = tighter(tightest, what == KVS_CGROUP_BYTES ? bytes(group, v2) : processors(group, v2));
        char *slash = strrchr(path, '/');
        if (!slash) return tightest;
        *slash = 0;
    }
}

static bool names(const char *controllers, const char *name) { /* "cpu,cpuacct", but not "cpuset", has "cpu" */
    size_t n = strlen(name);
    for (const char *p = controllers; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
        if (!strncmp(p, name, n) && (p[n] == 0 || p[n] == ',')) return true;
    return false;
}

double kvs_cgroup_limit_of(kvs_cgroup what, const char *list, const char *trees) {
    FILE *file = kvs_refused() ? NULL : fopen(list, "re");
    if (!file) return 0;
    const char *controller = what == KVS_CGROUP_BYTES ? "memory" : "cpu";
    char line[1024], root[200];
    double tightest = 0;
    while (fgets(line, sizeof line, file)) { /* "hierarchy:controllers:/path" */
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        bool v2 = !*++controllers;
        if (!v2 && !names(controllers, controller)) continue;
        snprintf(root, sizeof root, v2 ? "%s" : "%s/%s", trees, controller);
        tightest = tighter(tightest, tree_limit(what, root, path, v2));
    }
    fclose(file);
    return tightest;
}

double kvs_cgroup_limit(kvs_cgroup what) { return kvs_cgroup_limit_of(what, "/proc/self/cgroup", "/sys/fs/cgroup"); }
