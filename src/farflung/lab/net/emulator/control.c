/* Settings and questions, a line each; every line is answered by "ok", "error: ..." or one line of JSON.
 *
 *   before "start":  node NAME ADDRESS [NAT INNER]    mtu N    sysctl KEY VALUE
 *   start            makes the namespaces; {"pid", "user_namespace", "complaints", "nodes"}
 *   any time:        set NODE KEY=VALUE ...    link A B KEY=VALUE ... (both ways)    dlink A B KEY=VALUE ... (A to B)
 *                    seed N    stats    reset    spaces
 */
#define _GNU_SOURCE
#include "wan.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

int started;

static int mtu = 1500;
static struct sysctl sysctls[64];
static int sysctl_count;
static const char *distribution_names[] = {"normal", "lognormal", "pareto"};
static const char *nat_names[] = {"none", "full-cone", "cone", "symmetric"};

static int index_of(const char *name, const char **names, int count) {
    for (int i = 0; i < count; i++) if (!strcmp(names[i], name)) return i;
    return NONE;
}

static int find(const char *name) {
    for (int i = 0; i < node_count; i++) if (!strcmp(nodes[i].name, name)) return i;
    return NONE;
}

static int parse_address(const char *text, uint32_t *address) {
    struct in_addr in;
    if (inet_pton(AF_INET, text, &in) != 1) return 0;
    *address = ntohl(in.s_addr);
    return 1;
}

static void add_node(char **word, int count, char *error) {
    struct node *node = &nodes[node_count];
    int kind = count == 5 ? index_of(word[3], nat_names, 4) : NAT_OFF;
    if (node_count == MAX_NODES) snprintf(error, 200, "at most %d nodes", MAX_NODES);
    else if (started) strcpy(error, "nodes come before start");
    else if ((count != 3 && count != 5) || kind == NONE || !parse_address(word[2], &node->address)) strcpy(error, "node NAME ADDRESS [NAT INNER]");
    else {
        snprintf(node->name, sizeof node->name, "%.60s", word[1]);
        node->inner = node->address;
        if (kind != NAT_OFF) {
            if (!parse_address(word[4], &node->inner)) { strcpy(error, "node NAME ADDRESS [NAT INNER]"); return; }
            node->nat = nat_new(kind, node->inner, node->address);
        }
        node->up_queue = node->down_queue = 262144;
        node->keep_order = 1;
        node->loss_burst = 1;
        route_to(node->address, node_count++);
    }
}

static void print_spaces(FILE *out) {
    fprintf(out, "{\"pid\":%d,\"user_namespace\":%s,\"nodes\":{", getpid(), in_user_namespace ? "true" : "false");
    for (int i = 0; i < node_count; i++) {
        struct in_addr public = {htonl(nodes[i].address)}, inner = {htonl(nodes[i].inner)};
        char text[INET_ADDRSTRLEN];
        inet_ntop(AF_INET, &inner, text, sizeof text);
        fprintf(out, "%s\"%s\":{\"space\":%d,\"address\":\"%s\",\"nat\":\"%s\",", i ? "," : "", nodes[i].name, nodes[i].space, text,
                nat_names[nat_kind_of(nodes[i].nat)]);
        inet_ntop(AF_INET, &public, text, sizeof text);
        fprintf(out, "\"public\":\"%s\"}", text);
    }
    fprintf(out, "}");
}

static void start(FILE *out) {
    char *complaints = NULL;
    size_t size = 0;
    FILE *text = open_memstream(&complaints, &size);
    for (int i = 0; i < node_count; i++) open_space(&nodes[i], mtu, sysctls, sysctl_count, i ? NULL : text);
    fclose(text);
    started = 1;
    print_spaces(out);
    fprintf(out, ",\"complaints\":[");
    int first = 1;
    for (char *line = strtok(complaints, "\n"); line; line = strtok(NULL, "\n"), first = 0) fprintf(out, "%s\"%s\"", first ? "" : ",", line);
    fprintf(out, "]}\n");
    free(complaints);
}

static void clamp_to_now(ns_t *free_at) { if (*free_at > now_ns()) *free_at = now_ns(); }

static void set_node(struct node *node, const char *key, const char *value, char *error) {
    double x = atof(value);
    if (!strcmp(key, "up_mbps")) { node->up = x > 0 ? x * 125000 : 0; clamp_to_now(&node->up_free); }
    else if (!strcmp(key, "down_mbps")) { node->down = x > 0 ? x * 125000 : 0; clamp_to_now(&node->down_free); }
    else if (!strcmp(key, "up_queue")) node->up_queue = x;
    else if (!strcmp(key, "down_queue")) node->down_queue = x;
    else if (!strcmp(key, "access_rtt_ms")) node->rtt = (ns_t)(x * 1e6);
    else if (!strcmp(key, "jitter_ms")) node->jitter_ns = x * 1e6;
    else if (!strcmp(key, "jitter_pct")) node->jitter_pct = x;
    else if (!strcmp(key, "jitter_correlation_ms")) node->correlation_ns = x * 1e6;
    else if (!strcmp(key, "jitter_distribution")) {
        int found = index_of(value, distribution_names, 3);
        if (found == NONE) strcpy(error, "jitter_distribution: normal, lognormal or pareto");
        else node->distribution = found;
    }
    else if (!strcmp(key, "loss_pct")) node->loss = x / 100;
    else if (!strcmp(key, "loss_burst")) node->loss_burst = x;
    else if (!strcmp(key, "keep_order")) node->keep_order = x != 0;
    else if (!strcmp(key, "cut")) node->cut = x != 0;
    else if (!strcmp(key, "offload")) { node->offload = x != 0; if (started) set_offload(node); }
    else if (!strcmp(key, "label")) snprintf(node->label, sizeof node->label, "%.60s", value);
    else snprintf(error, 200, "unknown key %.40s", key);
}

static void set_pair(struct pair *pair, const char *key, const char *value, char *error) {
    double x = atof(value);
    if (!strcmp(key, "base_rtt_ms")) pair->base = (ns_t)(x * 1e6);
    else if (!strcmp(key, "rtt_ms")) pair->fixed = x < 0 ? NONE : (ns_t)(x * 1e6);
    else if (!strcmp(key, "loss_pct")) pair->loss = x / 100;
    else if (!strcmp(key, "cut")) pair->cut = x != 0;
    else snprintf(error, 200, "unknown key %.40s", key);
}

static double queued(ns_t free_at, double rate) {
    ns_t left = free_at - now_ns();
    return left > 0 ? left * 1e-9 * rate : 0;
}

#define N(x) (unsigned long long)(x)
static void print_stats(FILE *out) {
    struct rusage use;
    struct lateness late = lateness();
    getrusage(RUSAGE_SELF, &use);
    double cpu = use.ru_utime.tv_sec + use.ru_stime.tv_sec + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1e-6;
    fprintf(out, "{\"emulator\":{\"pid\":%d,\"scheduling\":\"%s\",\"cpu_s\":%.3f,\"in_flight\":%llu,\"delivered\":%llu,"
            "\"late_us_mean\":%.1f,\"late_us_max\":%.1f},\"nodes\":{", getpid(), scheduling_name, cpu, N(late.in_flight),
            N(late.packets), late.packets ? late.sum / 1000.0 / late.packets : 0, late.max / 1000.0);
    for (int i = 0; i < node_count; i++) {
        const struct node *n = &nodes[i];
        fprintf(out, "%s\"%s\":{\"label\":\"%s\",\"tx_packets\":%llu,\"tx_bytes\":%llu,\"rx_packets\":%llu,\"rx_bytes\":%llu,",
                i ? "," : "", n->name, n->label, N(n->tx_packets), N(n->tx_bytes), N(n->rx_packets), N(n->rx_bytes));
        fprintf(out, "\"drops\":{\"up_queue\":%llu,\"down_queue\":%llu,\"loss\":%llu,\"cut\":%llu,\"no_route\":%llu,\"nat\":%llu,\"write\":%llu},",
                N(n->drop_up), N(n->drop_down), N(n->drop_loss), N(n->drop_cut), N(n->drop_no_route), N(n->drop_nat), N(n->drop_write));
        fprintf(out, "\"up_queue_bytes\":%.0f,\"down_queue_bytes\":%.0f,\"up_wait_max_ms\":%.3f,\"down_wait_max_ms\":%.3f,",
                queued(n->up_free, n->up), queued(n->down_free, n->down), n->up_wait_max / 1e6, n->down_wait_max / 1e6);
        fprintf(out, "\"up_mbps\":%g,\"down_mbps\":%g,\"rtt_ms\":%g,\"jitter_ms\":%g,\"jitter_pct\":%g,\"jitter_correlation_ms\":%g,"
                "\"jitter_distribution\":\"%s\",\"loss_pct\":%g,\"loss_burst\":%g,\"keep_order\":%s,\"cut\":%s}",
                n->up / 125000, n->down / 125000, n->rtt / 5e5, n->jitter_ns / 1e6, n->jitter_pct, n->correlation_ns / 1e6,
                distribution_names[n->distribution], n->loss * 100, n->loss_burst, n->keep_order ? "true" : "false", n->cut ? "true" : "false");
    }
    fprintf(out, "},\"cuts\":[");
    int first = 1;
    for (int a = 0; a < node_count; a++)
        for (int b = 0; b < node_count; b++)
            if (pair_of(a, b)->cut) { fprintf(out, "%s[\"%s\",\"%s\"]", first ? "" : ",", nodes[a].name, nodes[b].name); first = 0; }
    fprintf(out, "]}\n");
}

static void reset(void) {
    for (int i = 0; i < node_count; i++) {
        struct node *n = &nodes[i];
        n->tx_packets = n->tx_bytes = n->rx_packets = n->rx_bytes = 0;
        n->drop_up = n->drop_down = n->drop_loss = n->drop_cut = n->drop_no_route = n->drop_nat = n->drop_write = 0;
        n->up_wait_max = n->down_wait_max = 0;
    }
    reset_lateness();
}

static void set_all(char **word, int count, char *error) {
    int pair = word[0][0] != 's', a = find(word[1]), b = pair ? find(word[2]) : a;
    if (a == NONE || b == NONE) { snprintf(error, 200, "no node %.60s", word[a == NONE ? 1 : 2]); return; }
    for (int i = pair ? 3 : 2; i < count && !*error; i++) {
        char *value = strchr(word[i], '=');
        if (!value) { snprintf(error, 200, "%.60s is not KEY=VALUE", word[i]); return; }
        *value++ = 0;
        if (!pair) set_node(&nodes[a], word[i], value, error);
        else {
            set_pair(pair_of(a, b), word[i], value, error);
            if (word[0][0] == 'l' && !*error) set_pair(pair_of(b, a), word[i], value, error);
        }
    }
}

void control_line(char *line, FILE *out) {
    char *word[64], error[256] = "";
    int count = 0;
    for (char *w = strtok(line, " \n"); w && count < 64; w = strtok(NULL, " \n")) word[count++] = w;
    if (!count) return;
    if (!strcmp(word[0], "node")) add_node(word, count, error);
    else if (!strcmp(word[0], "mtu") && count == 2) mtu = atoi(word[1]);
    else if (!strcmp(word[0], "sysctl") && count >= 3 && sysctl_count < 64) {
        struct sysctl *s = &sysctls[sysctl_count++];
        snprintf(s->key, sizeof s->key, "%s", word[1]);
        for (int i = 2, at = 0; i < count; i++) at += snprintf(s->value + at, sizeof s->value - at, "%s%.40s", i > 2 ? " " : "", word[i]);
    }
    else if (!strcmp(word[0], "start") && !started && node_count) { start(out); return; }
    else if (!strcmp(word[0], "set") && count >= 2) set_all(word, count, error);
    else if ((!strcmp(word[0], "link") || !strcmp(word[0], "dlink")) && count >= 3) set_all(word, count, error);
    else if (!strcmp(word[0], "seed") && count == 2) seed_random(strtoull(word[1], 0, 0));
    else if (!strcmp(word[0], "reset")) reset();
    else if (!strcmp(word[0], "stats")) { print_stats(out); return; }
    else if (!strcmp(word[0], "spaces")) { print_spaces(out); fprintf(out, "}\n"); return; }
    else snprintf(error, sizeof error, "unknown command %.60s", word[0]);
    if (*error) fprintf(out, "error: %s\n", error);
    else fprintf(out, "ok\n");
}
