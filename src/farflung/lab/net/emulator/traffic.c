/* What becomes of a packet: rates and queues, delay and jitter, losses, cuts. Times are of one clock, read once per batch. */
#define _GNU_SOURCE
#include "wan.h"

#include <linux/virtio_net.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct node nodes[MAX_NODES];
int node_count;

static struct pair *pairs;
static int16_t by_host[65536]; /* node of the last two bytes of an address */
static uint32_t subnet;
static struct lateness late;

_Static_assert(OFFLOAD_HEADER == sizeof(struct virtio_net_hdr), "the header of a TUN");

/* ---- random numbers: xoroshiro128+ */

static uint64_t state[2] = {0x9E3779B97F4A7C15ull, 0xD1B54A32D192ED03ull};

uint64_t random_bits(void) {
    uint64_t a = state[0], b = state[1], result = a + b;
    b ^= a;
    state[0] = ((a << 24) | (a >> 40)) ^ b ^ (b << 16);
    state[1] = (b << 37) | (b >> 27);
    return result;
}

void seed_random(uint64_t seed) {
    state[0] = seed * 0x9E3779B97F4A7C15ull + 1;
    state[1] = 0xD1B54A32D192ED03ull;
    for (int i = 0; i < 20; i++) random_bits();
}

static double uniform(void) { return ((random_bits() >> 11) + 0.5) * (1.0 / 9007199254740992.0); }

static double gaussian(void) {
    static int have;
    static double spare;
    if (have) { have = 0; return spare; }
    double u = uniform(), v = uniform(), r = sqrt(-2 * log(u));
    spare = r * sin(2 * M_PI * v);
    have = 1;
    return r * cos(2 * M_PI * v);
}

/* ---- who is where */

struct pair *pair_of(int from, int to) { return &pairs[(size_t)from * MAX_NODES + to]; }

void traffic_init(void) {
    pairs = calloc((size_t)MAX_NODES * MAX_NODES, sizeof *pairs); /* untouched pages cost nothing */
    if (!pairs) abort();
    for (int i = 0; i < 65536; i++) by_host[i] = NONE;
    seed_random((uint64_t)now_ns());
}

void route_to(uint32_t address, int node) {
    subnet = address & 0xffff0000u;
    by_host[address & 0xffff] = (int16_t)node;
    for (int i = 0; i <= node; i++) pair_of(i, node)->fixed = pair_of(node, i)->fixed = NONE;
}

int node_at(uint32_t address) { return (address & 0xffff0000u) == subnet ? by_host[address & 0xffff] : NONE; }

/* ---- packets under way: a pool by size, and a 4-ary heap by time */

struct packet {
    ns_t due;
    uint64_t order;
    int16_t to;
    uint8_t leaving, size_class; /* leaving: has passed the downlink's queue */
    int32_t length, wire;        /* with the TUN's header; bytes on the link */
    struct packet *next;
    unsigned char data[];
};

static const int class_size[] = {256, 1600, 9216, 66 * 1024};
static const uint64_t most_bytes = (uint64_t)4 << 30;
static struct packet *pool[4];
static uint64_t live_bytes;

static struct packet *new_packet(int length) {
    int c = 0;
    if (length > class_size[3] || live_bytes >= most_bytes) return NULL;
    while (class_size[c] < length) c++;
    struct packet *p = pool[c];
    if (p) pool[c] = p->next;
    else if (!(p = malloc(sizeof *p + class_size[c]))) return NULL;
    p->size_class = c;
    late.in_flight++;
    live_bytes += class_size[c];
    return p;
}

static void free_packet(struct packet *p) {
    late.in_flight--;
    live_bytes -= class_size[p->size_class];
    p->next = pool[p->size_class];
    pool[p->size_class] = p;
}

static struct packet **heap;
static int heap_size, heap_room;
static uint64_t pushed;

static inline int before(const struct packet *a, const struct packet *b) {
    return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void push(struct packet *p) {
    if (heap_size == heap_room) {
        heap_room = heap_room ? heap_room * 2 : 4096;
        if (!(heap = realloc(heap, heap_room * sizeof *heap))) abort();
    }
    p->order = pushed++;
    int i = heap_size++;
    for (; i; i = (i - 1) >> 2) {
        struct packet *parent = heap[(i - 1) >> 2];
        if (!before(p, parent)) break;
        heap[i] = parent;
    }
    heap[i] = p;
}

static struct packet *pop(void) {
    struct packet *top = heap[0], *p = heap[--heap_size];
    int i = 0;
    for (;;) {
        int child = 4 * i + 1, first = child;
        if (child >= heap_size) break;
        for (int k = child + 1; k < child + 4 && k < heap_size; k++) if (before(heap[k], heap[first])) first = k;
        if (!before(heap[first], p)) break;
        heap[i] = heap[first];
        i = first;
    }
    if (heap_size) heap[i] = p;
    return top;
}

ns_t next_due(void) { return heap_size ? heap[0]->due : NONE; }

/* ---- the model */

/* The standard deviation of the pair's RTT is sqrt((jA^2 + jB^2) / 2); each direction has 1/sqrt(2) of it. */
static ns_t one_way(int from, int to, ns_t at) {
    const struct node *a = &nodes[from], *b = &nodes[to];
    struct pair *p = pair_of(from, to);
    double rtt = p->fixed != NONE ? p->fixed : a->rtt + b->rtt + p->base, mean = rtt / 2;
    double ja = a->jitter_ns + a->jitter_pct * rtt / 100, jb = b->jitter_ns + b->jitter_pct * rtt / 100;
    double variance = (ja * ja + jb * jb) / 4;
    if (variance <= 0) return (ns_t)mean;
    double deviation = sqrt(variance), time = a->correlation_ns > b->correlation_ns ? a->correlation_ns : b->correlation_ns, z;
    if (time <= 0) z = gaussian();
    else { /* an Ornstein-Uhlenbeck process, seen when a packet passes */
        double since = at - p->z_at;
        if (!p->z_at || since > 20 * time) z = gaussian();
        else if (since <= 0) z = p->z;
        else { double kept = exp(-since / time); z = kept * p->z + sqrt(1 - kept * kept) * gaussian(); }
        p->z = z;
        if (at > p->z_at) p->z_at = at;
    }
    int distribution = a->distribution > b->distribution ? a->distribution : b->distribution;
    double delay;
    if (distribution == NORMAL || mean <= 0) delay = mean + deviation * z;
    else if (distribution == LOGNORMAL) { /* mean and deviation as asked, never negative */
        double v = log(1 + variance / (mean * mean));
        delay = exp(log(mean) - v / 2 + sqrt(v) * z);
    } else { /* Pareto of shape 3: mean and deviation as asked, a long tail, begins at mean - 0.577 deviations */
        double u = 0.5 * erfc(z / M_SQRT2);
        if (u < 1e-9) u = 1e-9;
        const double shape = 3, centre = shape / (shape - 1), spread = sqrt(shape / ((shape - 1) * (shape - 1) * (shape - 2)));
        delay = mean + deviation * (pow(u, -1 / shape) - centre) / spread;
    }
    return delay < 0 ? 0 : (ns_t)delay;
}

/* Puts wire bytes on a link at a time; when they have left it, or NONE where its queue is full. */
static ns_t through_link(double rate, double queue, ns_t *free_at, ns_t *wait_max, ns_t at, int wire) {
    if (rate <= 0) return at;
    ns_t begins = *free_at > at ? *free_at : at;
    if (begins > at && (begins - at) * 1e-9 * rate + wire > queue) return NONE;
    if (begins - at > *wait_max) *wait_max = begins - at;
    return *free_at = begins + (ns_t)(wire / rate * 1e9);
}

static int is_lost(const struct node *a, const struct node *b, struct pair *p) {
    double loss = (a->loss + b->loss) / 2 + p->loss;
    if (loss <= 0) return 0;
    double burst = a->loss_burst > b->loss_burst ? a->loss_burst : b->loss_burst;
    if (burst <= 1) return uniform() < loss;
    /* Gilbert: the bad state ends with 1 / burst and begins so often that its share is the loss */
    double leave = 1 / burst, begin = loss < 1 ? leave * loss / (1 - loss) : 1;
    p->bad = p->bad ? uniform() >= leave : uniform() < begin;
    return p->bad;
}

static void deliver(int to, unsigned char *data, int length, int wire, ns_t at) {
    struct node *b = &nodes[to];
    if (b->nat && !nat_inward(b->nat, data, length, at)) { b->drop_nat++; return; }
    if (write(b->tun, data, length) < 0) { b->drop_write++; return; }
    b->rx_packets++;
    b->rx_bytes += wire;
}

static int wire_bytes(const unsigned char *data, int length) { /* a super-packet travels as segments, each with its headers */
    const struct virtio_net_hdr *header = (const void *)data;
    int bytes = length - OFFLOAD_HEADER;
    if (header->gso_type == VIRTIO_NET_HDR_GSO_NONE || !header->gso_size || !header->hdr_len) return bytes;
    int segments = (bytes - header->hdr_len + header->gso_size - 1) / header->gso_size;
    return segments > 1 ? bytes + (segments - 1) * header->hdr_len : bytes;
}

void packet_from(int from, unsigned char *data, int length, ns_t at) {
    struct node *a = &nodes[from];
    const unsigned char *ip = data + OFFLOAD_HEADER;
    if (length < OFFLOAD_HEADER + 20 || (ip[0] >> 4) != 4) { a->drop_no_route++; return; }
    int to = node_at((uint32_t)ip[16] << 24 | ip[17] << 16 | ip[18] << 8 | ip[19]);
    if (to == NONE || to == from) { a->drop_no_route++; return; }
    if (a->nat && !nat_outward(a->nat, data, length, at)) { a->drop_nat++; return; }
    struct node *b = &nodes[to];
    struct pair *p = pair_of(from, to);
    int wire = wire_bytes(data, length);
    a->tx_packets++;
    a->tx_bytes += wire;
    if (a->cut || p->cut) { a->drop_cut++; return; }
    ns_t sent = through_link(a->up, a->up_queue, &a->up_free, &a->up_wait_max, at, wire);
    if (sent == NONE) { a->drop_up++; return; }
    if (is_lost(a, b, p)) { a->drop_loss++; return; }
    ns_t arrives = sent + one_way(from, to, sent);
    if (a->keep_order || b->keep_order) { if (arrives < p->last) arrives = p->last; p->last = arrives; }
    if (arrives <= at + slack && b->down <= 0) { /* nothing to wait for */
        if (b->cut) b->drop_cut++;
        else deliver(to, data, length, wire, at);
        return;
    }
    struct packet *q = new_packet(length);
    if (!q) { a->drop_up++; return; }
    q->due = arrives; q->to = to; q->leaving = 0; q->length = length; q->wire = wire;
    memcpy(q->data, data, length);
    push(q);
}

void send_due(void) {
    if (!heap_size) return;
    ns_t now = now_ns();
    for (int done = 0; heap_size && heap[0]->due <= now + slack;) {
        struct packet *q = pop();
        struct node *b = &nodes[q->to];
        if (b->cut) { b->drop_cut++; free_packet(q); continue; }
        if (!q->leaving) {
            ns_t out = through_link(b->down, b->down_queue, &b->down_free, &b->down_wait_max, q->due, q->wire);
            if (out == NONE) { b->drop_down++; free_packet(q); continue; }
            q->due = out;
            if (out > now + slack) { q->leaving = 1; push(q); continue; }
        }
        ns_t lag = now - q->due;
        if (lag > 0) { late.sum += lag; if ((uint64_t)lag > late.max) late.max = lag; }
        late.packets++;
        deliver(q->to, q->data, q->length, q->wire, now);
        free_packet(q);
        if ((++done & 15) == 0) { now = now_ns(); if (done >= 256) break; } /* others have packets to read */
    }
}

struct lateness lateness(void) { return late; }
void reset_lateness(void) { late.packets = late.sum = late.max = 0; }
