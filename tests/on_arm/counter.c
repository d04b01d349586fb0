// A plugin of qemu: how many instructions run between driver.cpp's count_from_here and count_to_here, printed
// at each. Declares what it needs of qemu's plugin interface, whose header few systems bring.
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t qemu_plugin_id_t;
enum qemu_plugin_cb_flags { QEMU_PLUGIN_CB_NO_REGS };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
struct qemu_plugin_insn* qemu_plugin_tb_get_insn(const struct qemu_plugin_tb*, size_t);
const char* qemu_plugin_insn_symbol(const struct qemu_plugin_insn*);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t,
                                           void (*)(qemu_plugin_id_t, struct qemu_plugin_tb*));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb*, void (*)(unsigned, void*),
                                          enum qemu_plugin_cb_flags, void*);

static uint64_t instructions;

static void begin(unsigned cpu, void* data) { instructions = 0; }
static void end(unsigned cpu, void* data) { fprintf(stderr, "instructions %" PRIu64 "\n", instructions); }
static void run(unsigned cpu, void* count) { instructions += (uintptr_t)count; }

static void translated(qemu_plugin_id_t id, struct qemu_plugin_tb* block) {
  const char* symbol = qemu_plugin_insn_symbol(qemu_plugin_tb_get_insn(block, 0));
  void (*callback)(unsigned, void*) = run;
  if (symbol && !strcmp(symbol, "count_from_here")) callback = begin;
  if (symbol && !strcmp(symbol, "count_to_here")) callback = end;
  qemu_plugin_register_vcpu_tb_exec_cb(block, callback, QEMU_PLUGIN_CB_NO_REGS,
                                       (void*)qemu_plugin_tb_n_insns(block));
}

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

struct qemu_info_t;
__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id,
                                                               const struct qemu_info_t* info, int count,
                                                               char** arguments) {
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  return 0;
}
