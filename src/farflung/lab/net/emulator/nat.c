/* Network address translation as home routers do it (RFC 4787, RFC 5382), for UDP, TCP and ICMP echo.
 *
 *   full-cone   one public port for each inner port; once it is there, anybody may send to it
 *   cone        the same mapping; only whom the inner port has sent to may answer (port-restricted)
 *   symmetric   a random public port for each peer; only that peer may answer
 *
 * A packet that matches nothing is dropped, and so is a fragment: it carries no port.
 */
#define _GNU_SOURCE
#include "wan.h"

#include <linux/virtio_net.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FLOWS 4096
#define FIRST_PORT 1024
static const ns_t idle_udp = 120ll * 1000000000, idle_tcp = 7440ll * 1000000000; /* the least that the RFCs ask for */

struct flow { uint8_t protocol; uint16_t inner, outer, peer_port; uint32_t peer; ns_t used; };
struct nat { enum nat_kind kind; uint32_t inner, public; int count; struct flow flows[MAX_FLOWS]; };

struct fields { unsigned char *ip, *address, *port, *sum; uint8_t protocol; uint32_t peer; uint16_t peer_port; int partial; };

struct nat *nat_new(enum nat_kind kind, uint32_t inner, uint32_t public) {
    struct nat *nat = calloc(1, sizeof *nat);
    if (!nat) abort();
    nat->kind = kind; nat->inner = inner; nat->public = public;
    return nat;
}

enum nat_kind nat_kind_of(const struct nat *nat) { return nat ? nat->kind : NAT_OFF; }

static uint32_t get32(const unsigned char *b) { return (uint32_t)b[0] << 24 | b[1] << 16 | b[2] << 8 | b[3]; }
static uint16_t get16(const unsigned char *b) { return (uint16_t)(b[0] << 8 | b[1]); }

/* Writes new 16 bits over old ones and mends a checksum over them (RFC 1624); a partial one is a sum not yet complemented. */
static void replace16(unsigned char *at, uint16_t value, unsigned char *sum, int partial) {
    if (sum) {
        uint32_t total = (partial ? get16(sum) : (uint16_t)~get16(sum)) + (uint16_t)~get16(at) + (uint32_t)value;
        while (total >> 16) total = (total & 0xffff) + (total >> 16);
        uint16_t mended = partial ? (uint16_t)total : (uint16_t)~total;
        sum[0] = mended >> 8; sum[1] = mended & 0xff;
    }
    at[0] = value >> 8; at[1] = value & 0xff;
}

static void replace_address(const struct fields *f, uint32_t value) {
    unsigned char header_sum_and_address[6]; /* the same two words go into two checksums: the header's first, on a copy */
    memcpy(header_sum_and_address, f->ip + 10, 2);
    memcpy(header_sum_and_address + 2, f->address, 4);
    replace16(header_sum_and_address + 2, value >> 16, header_sum_and_address, 0);
    replace16(header_sum_and_address + 4, value & 0xffff, header_sum_and_address, 0);
    memcpy(f->ip + 10, header_sum_and_address, 2);
    unsigned char *sum = f->protocol == IPPROTO_ICMP ? NULL : f->sum; /* ICMP's does not cover addresses */
    replace16(f->address, value >> 16, sum, f->partial);
    replace16(f->address + 2, value & 0xffff, sum, f->partial);
}

static void replace_port(const struct fields *f, uint16_t value) {
    replace16(f->port, value, f->partial ? NULL : f->sum, 0); /* a partial sum covers the pseudo-header alone */
}

static int parse(unsigned char *data, int length, int outward, struct fields *f) {
    const struct virtio_net_hdr *header = (const void *)data;
    unsigned char *ip = data + OFFLOAD_HEADER, *l4;
    int rest = length - OFFLOAD_HEADER, header_length = (ip[0] & 15) * 4;
    if (rest < header_length + 8 || header_length < 20 || (get16(ip + 6) & 0x1fff)) return 0;
    l4 = ip + header_length;
    f->ip = ip;
    f->protocol = ip[9];
    f->address = ip + (outward ? 12 : 16);
    f->peer = get32(ip + (outward ? 16 : 12));
    f->partial = header->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;
    if (f->protocol == IPPROTO_UDP || f->protocol == IPPROTO_TCP) {
        if (f->protocol == IPPROTO_TCP && rest < header_length + 20) return 0;
        f->port = l4 + (outward ? 0 : 2);
        f->peer_port = get16(l4 + (outward ? 2 : 0));
        f->sum = l4 + (f->protocol == IPPROTO_UDP ? 6 : 16);
        if (f->protocol == IPPROTO_UDP && !f->partial && !get16(f->sum)) f->sum = NULL; /* none was sent */
        return 1;
    }
    if (f->protocol != IPPROTO_ICMP || l4[0] != (outward ? 8 : 0)) return 0; /* echo out, its reply in */
    f->port = l4 + 4;
    f->peer_port = 0;
    f->sum = l4 + 2;
    return 1;
}

static int alive(const struct flow *flow, ns_t at) { return at - flow->used < (flow->protocol == IPPROTO_TCP ? idle_tcp : idle_udp); }

static int port_taken(const struct nat *nat, uint8_t protocol, uint16_t port, ns_t at) {
    for (int i = 0; i < nat->count; i++) {
        const struct flow *flow = &nat->flows[i];
        if (flow->protocol == protocol && flow->outer == port && alive(flow, at)) return 1;
    }
    return 0;
}

static uint16_t choose_port(struct nat *nat, const struct fields *f, uint16_t inner, ns_t at) {
    if (nat->kind != NAT_SYMMETRIC) {
        for (int i = 0; i < nat->count; i++) { /* endpoint-independent: the port that the inner one has already */
            const struct flow *flow = &nat->flows[i];
            if (flow->protocol == f->protocol && flow->inner == inner && alive(flow, at)) return flow->outer;
        }
        if (inner >= FIRST_PORT && !port_taken(nat, f->protocol, inner, at)) return inner;
    }
    uint16_t port; /* at most MAX_FLOWS are taken, so some draw hits a free one */
    do port = FIRST_PORT + random_bits() % (65536 - FIRST_PORT); while (port_taken(nat, f->protocol, port, at));
    return port;
}

static struct flow *room(struct nat *nat, ns_t at) { /* a new place, or that of a dead flow, or of the one unused the longest */
    struct flow *oldest = &nat->flows[0];
    for (int i = 0; i < nat->count; i++) {
        if (!alive(&nat->flows[i], at)) return &nat->flows[i];
        if (nat->flows[i].used < oldest->used) oldest = &nat->flows[i];
    }
    return nat->count < MAX_FLOWS ? &nat->flows[nat->count++] : oldest;
}

int nat_outward(struct nat *nat, unsigned char *data, int length, ns_t at) {
    struct fields f;
    if (!parse(data, length, 1, &f) || get32(f.address) != nat->inner) return 0;
    uint16_t inner = get16(f.port);
    struct flow *found = NULL;
    for (int i = 0; i < nat->count && !found; i++) {
        struct flow *flow = &nat->flows[i];
        if (flow->protocol == f.protocol && flow->inner == inner && flow->peer == f.peer && flow->peer_port == f.peer_port &&
            alive(flow, at)) found = flow;
    }
    if (!found) {
        uint16_t outer = choose_port(nat, &f, inner, at);
        found = room(nat, at);
        *found = (struct flow){f.protocol, inner, outer, f.peer_port, f.peer, at};
    }
    found->used = at;
    replace_address(&f, nat->public);
    replace_port(&f, found->outer);
    return 1;
}

int nat_inward(struct nat *nat, unsigned char *data, int length, ns_t at) {
    struct fields f;
    if (!parse(data, length, 0, &f)) return 0;
    uint16_t outer = get16(f.port);
    for (int i = 0; i < nat->count; i++) {
        struct flow *flow = &nat->flows[i];
        if (flow->protocol != f.protocol || flow->outer != outer || !alive(flow, at)) continue;
        if (nat->kind != NAT_FULL_CONE && (flow->peer != f.peer || flow->peer_port != f.peer_port)) continue;
        flow->used = at;
        uint16_t inner = flow->inner;
        replace_address(&f, nat->inner);
        replace_port(&f, inner);
        return 1;
    }
    return 0;
}
