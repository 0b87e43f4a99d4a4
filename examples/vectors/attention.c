/* Answers golden vectors of softmax attention, with nothing but the C library.
 *
 *     refattn vectors softmax -o golden
 *     cc -O2 -o attention attention.c -lm && mkdir -p answers && ./attention golden answers
 *     refattn vectors --verify golden answers
 *
 * Compiled with -DTOP_LEFT it has a mistake that many kernels had: causality aligned with the first key, not the last.
 * Replace `attend` by a call of your kernel; the rest reads and writes files.  It expects a little-endian machine and float32 vectors.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- JSON, read in place ---------------------------------------------------------------------------------------------------- */

static const char *blank(const char *p) {
    while (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r' || *p == ',' || *p == ':') p++;
    return p;
}

/* The end of the value that begins at p. */
static const char *skip(const char *p) {
    p = blank(p);
    if (*p == '"') {
        for (p++; *p != '"'; p++)
            if (*p == '\\') p++;
        return p + 1;
    }
    if (*p == '{' || *p == '[') {
        char end = *p == '{' ? '}' : ']';
        for (p = blank(p + 1); *p != end; p = blank(skip(p))) {}
        return p + 1;
    }
    while (*p && !strchr(",]} \n\t\r", *p)) p++;
    return p;
}

/* The value of a member of the object at p, or NULL. */
static const char *member(const char *p, const char *key) {
    for (p = blank(blank(p) + 1); *p != '}'; p = blank(skip(p))) {
        const char *name = p;
        p = blank(skip(p));
        if ((size_t)(skip(name) - name) == strlen(key) + 2 && !strncmp(name + 1, key, strlen(key))) return p;
    }
    return NULL;
}

static int is(const char *p, const char *text) { return p && !strncmp(p, text, strlen(text)); }

/* A number that is there, or another one where it is null or missing. */
static double number(const char *p, double otherwise) { return !p || is(p, "null") ? otherwise : strtod(p, NULL); }

/* ---- files -------------------------------------------------------------------------------------------------------------------- */

static void fail(const char *what, const char *which) {
    fprintf(stderr, "%s: %s\n", what, which);
    exit(2);
}

static char *contents(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("cannot read", path);
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *bytes = malloc(size + 1);
    if (fread(bytes, 1, size, file) != (size_t)size) fail("cannot read", path);
    bytes[size] = 0;
    fclose(file);
    return bytes;
}

typedef struct {
    const void *data; /* NULL: not given */
    long shape[4], step[4]; /* a step of 0 along an axis of size 1, so that it broadcasts */
} Tensor;

/* A tensor of a safetensors file: 8 bytes with the header's length, the header, the data. */
static Tensor tensor(const char *file, const char *name, const char *dtype) {
    unsigned long long length;
    memcpy(&length, file, 8);
    Tensor found = {NULL, {1, 1, 1, 1}, {0, 0, 0, 0}};
    const char *entry = member(file + 8, name);
    if (!entry) return found;
    if (!is(member(entry, "dtype") + 1, dtype)) fail("not of the element type read here", name);
    const char *offsets = blank(member(entry, "data_offsets") + 1), *sizes = blank(member(entry, "shape") + 1);
    found.data = file + 8 + length + strtoll(offsets, NULL, 10);
    int axes = 0;
    for (; *sizes != ']'; sizes = blank(skip(sizes))) found.shape[axes++] = strtol(sizes, NULL, 10);
    for (long a = axes - 1, step = 1; a >= 0; step *= found.shape[a--]) found.step[a] = found.shape[a] == 1 ? 0 : step;
    return found;
}

static long at(const Tensor *x, long a, long b, long c, long d) {
    return a * x->step[0] + b * x->step[1] + c * x->step[2] + d * x->step[3];
}

static float real(const Tensor *x, long a, long b, long c, long d, float absent) {
    return x->data ? ((const float *)x->data)[at(x, a, b, c, d)] : absent;
}

/* ---- attention ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    float scale, softcap; /* softcap 0: none */
    int causal, top_left;
    long left, right; /* of the window */
} Params;

static void attend(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor mask, Tensor sinks, Params p, float *out, float *lse) {
    long B = q.shape[0], H = q.shape[1], T = q.shape[2], D = q.shape[3], S = k.shape[2], E = v.shape[3], group = H / k.shape[1];
    float *score = malloc((S + 1) * sizeof *score);
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++)
            for (long i = 0; i < T; i++) {
#ifdef TOP_LEFT
                long own = i;
#else
                long own = p.top_left ? i : i + S - T;
#endif
                float top = real(&sinks, h, 0, 0, 0, -INFINITY);
                for (long j = 0; j < S; j++) {
                    int seen = (!p.causal || j <= own) && j >= own - p.left && j <= own + p.right;
                    if (mask.data) seen = seen && ((const char *)mask.data)[at(&mask, b, h, i, j)];
                    float s = 0;
                    for (long d = 0; d < D; d++) s += real(&q, b, h, i, d, 0) * real(&k, b, h / group, j, d, 0);
                    s *= p.scale;
                    if (p.softcap > 0) s = p.softcap * tanhf(s / p.softcap);
                    score[j] = seen ? s + real(&bias, b, h, i, j, 0) : -INFINITY;
                    if (score[j] > top) top = score[j];
                }
                long row = (b * H + h) * T + i;
                float total = top == -INFINITY ? 0 : expf(real(&sinks, h, 0, 0, 0, -INFINITY) - top);
                for (long e = 0; e < E; e++) out[row * E + e] = 0;
                for (long j = 0; j < S; j++) {
                    if (score[j] == -INFINITY) continue;
                    float weight = expf(score[j] - top);
                    total += weight;
                    for (long e = 0; e < E; e++) out[row * E + e] += weight * real(&v, b, h / group, j, e, 0);
                }
                for (long e = 0; e < E && total > 0; e++) out[row * E + e] /= total;
                lse[row] = total > 0 ? top + logf(total) : -INFINITY;
            }
    free(score);
}

/* ---- one case after another --------------------------------------------------------------------------------------------------- */

static void answer(const char *from, const char *to, const char *entry) {
    char name[256], path[1024], header[512];
    const char *text = member(entry, "file");
    snprintf(name, sizeof name, "%.*s", (int)(skip(text) - text - 2), text + 1);
    snprintf(path, sizeof path, "%s/%s", from, name);
    char *file = contents(path);

    const char *given = member(entry, "params"), *resolved = member(entry, "resolved"), *window = member(given, "window");
    Params p = {0};
    p.scale = (float)number(member(given, "scale"), number(member(resolved, "scale"), 1));
    p.softcap = (float)number(member(given, "softcap"), 0);
    p.top_left = is(member(given, "causal"), "\"top_left\"");
    p.causal = p.top_left || is(member(given, "causal"), "true");
    p.left = p.right = 1L << 40;
    if (!is(window, "null")) {
        const char *side = blank(window + 1);
        p.left = (long)number(side, (double)p.left);
        p.right = (long)number(blank(skip(side)), (double)p.right);
    }
    Tensor q = tensor(file, "q", "F32"), k = tensor(file, "k", "F32"), v = tensor(file, "v", "F32");
    long rows = q.shape[0] * q.shape[1] * q.shape[2], wide = rows * v.shape[3];
    float *out = malloc((wide + 1) * sizeof *out), *lse = malloc((rows + 1) * sizeof *lse);
    attend(q, k, v, tensor(file, "bias", "F32"), tensor(file, "mask", "BOOL"), tensor(file, "sinks", "F32"), p, out, lse);

    int length = snprintf(header, sizeof header,
        "{\"out\":{\"dtype\":\"F32\",\"shape\":[%ld,%ld,%ld,%ld],\"data_offsets\":[0,%ld]},"
        "\"lse\":{\"dtype\":\"F32\",\"shape\":[%ld,%ld,%ld],\"data_offsets\":[%ld,%ld]}}",
        q.shape[0], q.shape[1], q.shape[2], v.shape[3], 4 * wide, q.shape[0], q.shape[1], q.shape[2], 4 * wide, 4 * (wide + rows));
    unsigned long long size = (unsigned long long)length;
    snprintf(path, sizeof path, "%s/%s", to, name);
    FILE *written = fopen(path, "wb");
    if (!written) fail("cannot write", path);
    fwrite(&size, 8, 1, written);
    fwrite(header, 1, size, written);
    fwrite(out, 4, wide, written);
    fwrite(lse, 4, rows, written);
    fclose(written);
    free(out), free(lse), free(file);
}

int main(int argc, char **argv) {
    if (argc != 3) fail("usage", "attention VECTORS ANSWERS");
    char path[1024];
    snprintf(path, sizeof path, "%s/manifest.json", argv[1]);
    char *manifest = contents(path);
    const char *entry = blank(member(manifest, "cases") + 1);
    for (; *entry != ']'; entry = blank(skip(entry)))
        if (is(member(entry, "variant"), "\"softmax\"")) answer(argv[1], argv[2], entry);
    free(manifest);
    return 0;
}
